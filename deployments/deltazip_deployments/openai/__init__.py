"""The OpenAI HTTP API: what requests may say and how answers are written. Knows nothing of Ray."""

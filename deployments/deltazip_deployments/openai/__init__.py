"""The OpenAI HTTP API: the fields of requests and the form of answers. Independent of Ray."""

"""Traces, arrivals and an open-loop client for multi-variant endpoints."""

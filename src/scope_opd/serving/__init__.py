"""Talking to inference servers: addresses, keys, one HTTP client, pools with retries and breakers, vLLM answers."""

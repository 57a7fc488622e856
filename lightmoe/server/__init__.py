"""HTTP: OpenAI routes, request schema, tokenizer and the page, in front of any ServingEngine."""

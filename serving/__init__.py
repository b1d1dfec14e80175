"""An OpenAI-compatible server for comparing models: requests in, answers of one model at a time out."""

"""Programs of launches, one an op; as text; block sizes."""

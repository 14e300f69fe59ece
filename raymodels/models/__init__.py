"""Build a model and its tokenizer. Nothing distributed lives here."""

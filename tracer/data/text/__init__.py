"""Texts and conversations as tokenized training examples, in rows of documents or of packed blocks."""

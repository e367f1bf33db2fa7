"""Rivals: other self-supervised methods on the encoder, the data and the budget of S2DC; a family a file."""

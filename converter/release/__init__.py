"""Make a folder fit for publishing: manifest, card, licence, signature."""

"""What makes a folder fit to be published: manifest, card, licence, signature."""

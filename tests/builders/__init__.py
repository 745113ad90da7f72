"""What tests are made of: tiny models, checkpoints, hostile files and a Hub on loopback."""

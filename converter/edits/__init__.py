"""How an edit changes a weight: formulas, rounding, error bounds. No files are opened here."""

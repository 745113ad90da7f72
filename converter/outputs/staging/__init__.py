"""A destination that one run holds, fills beside its place and moves there in one step."""

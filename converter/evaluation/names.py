"""Names that systems have in the results of an evaluation."""

UNEDITED, EDITED = "unedited", "edited"

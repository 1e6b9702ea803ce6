"""One module per revision; numbered, linear, never edited once released."""

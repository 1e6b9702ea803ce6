"""What the code promises about itself: documents, import rules, error codes, the state machine."""

"""What happens before and after the model: the steps that a manifest names."""

"""Plain torch.nn models, readable alone; fastops speeds them up from outside."""

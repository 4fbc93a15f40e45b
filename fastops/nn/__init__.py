"""Modules that subclass torch.nn and override only forward: same constructor, same state_dict."""

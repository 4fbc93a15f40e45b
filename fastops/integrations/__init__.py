"""Registrations with other libraries; import the one you want."""

"""What obeys the controls: gradient transformations for use inside `stabilize`."""

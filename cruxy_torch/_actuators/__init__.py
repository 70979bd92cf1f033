"""What obeys the controls: directions, and the one frame of an update."""

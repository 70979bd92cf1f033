"""Everything the documentation claims, each as a command that measures it again."""

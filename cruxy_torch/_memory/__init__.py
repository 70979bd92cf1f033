"""What is kept beside parameters, and what it comes to."""

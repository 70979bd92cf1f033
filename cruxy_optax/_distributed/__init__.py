"""What is split over devices."""

"""What is known of shards: which rank holds what, and sums over all of them."""

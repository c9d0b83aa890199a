"""Teacher states at response positions, captured once into Arrow shards and read by every student."""

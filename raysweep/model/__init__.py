"""Dense and mixture-of-experts decoders."""

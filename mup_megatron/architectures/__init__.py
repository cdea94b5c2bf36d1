"""What a model consists of: configuration → parameter names and global shapes. Allocates nothing, needs no torch."""

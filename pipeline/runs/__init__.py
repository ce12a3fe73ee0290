"""A run on disk: its folder, files, hashes, manifest, lock and logs."""

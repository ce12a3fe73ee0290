"""The certificate's links, a file each."""

"""The certificate's in-process half."""

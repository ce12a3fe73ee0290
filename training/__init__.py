"""Turn a dataset into an adapter, a merged FP16 folder and a Q8_0 GGUF; needs torch only inside the functions that train."""

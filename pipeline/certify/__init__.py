"""The certificate: each link from the dataset to the served answer, proven or named as the broken one.

Seven links, each a file in ``links``: ``adapter`` (it moved), ``merged`` (merge = base + adapter), ``gguf`` (GGUF = merged),
``served`` (served = exported), ``tuned`` (tuned is not the base), ``stops`` (it stops), ``custody`` (hashes from dataset to
engine). They work on files and on collected evidence, without torch; ``training.certify.certify`` adds what needs the model in process.
"""

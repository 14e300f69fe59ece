"""Source -> prepared dataset -> which samples a step sees -> tensors.

`sources` names the documents, `tokenizer` and `prepare` turn them into shards of token ids, `dataset` cuts those into
samples, `order` says which samples make up a global step, and `batches` (the only file with torch) collates them.
"""

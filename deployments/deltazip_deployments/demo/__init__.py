"""The whole path on one small machine: train, compress, publish, serve, load, report.

``tasks`` and ``tokenizer`` say what is learnt, ``recipe`` and ``training`` how, ``checkpoints`` keeps what was trained;
``pipeline`` goes from there to served answers, ``report`` shows them, ``command`` is what a user starts.
"""

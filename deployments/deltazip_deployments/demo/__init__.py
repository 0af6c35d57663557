"""The whole path on one small machine: train, compress, publish, serve, load, report.

``tasks`` and ``tokenizer`` define what the models learn, ``recipe`` and ``training`` how; ``checkpoints`` caches them.
``pipeline`` goes from there to served answers, ``report`` shows the result, ``command`` is the user's command.
"""

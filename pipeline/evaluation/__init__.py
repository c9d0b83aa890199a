"""Generation, ROUGE-L and the runner that scores a model on a benchmark."""

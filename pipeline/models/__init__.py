"""Loading models and tokenizers, their output heads (logit lens), layer maps and the student's initial weights."""

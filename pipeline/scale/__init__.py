"""What a distillation costs on machines of other sizes; `python -m pipeline.scale` writes the tables of docs/scale.md."""

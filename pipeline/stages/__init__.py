"""The stages: each opens its inputs, computes, and commits one artifact."""

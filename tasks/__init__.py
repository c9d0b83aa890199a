"""One Prefect task per stage. Each calls the stage's plain function, records it, and passes references only."""

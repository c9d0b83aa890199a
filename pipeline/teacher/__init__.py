"""What the teacher tells the student: one signal, two interchangeable sources (online and cached)."""

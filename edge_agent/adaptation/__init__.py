"""Phase 3: correct the student's predictions while the camera's pictures drift, with forward passes only."""

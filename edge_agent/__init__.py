"""The edge side: turns a teacher's paid answers into a small model of the device's own."""

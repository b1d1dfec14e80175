"""What is fitted: calibration, the closed form, distillation, and the maths under them."""

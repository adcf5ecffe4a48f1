"""Evaluation: named protocols, PSNR and SSIM for every image, tables and pictures."""

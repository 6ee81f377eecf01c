"""Operations, one folder each: public function, reference, compiled CPU code, Triton kernels."""

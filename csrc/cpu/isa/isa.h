// Everything that differs between instruction sets. The rest of csrc/cpu is one source for all of them.
//
// A header for an instruction set defines, in the unnamed namespace of fastlstm:
//
//   kVectorBytes     bytes of a vector; then it includes vector.h, which makes the types from it
//   kTileRows        rows of a register tile: kTileRows x 4 vectors of sums must fit the registers, with a few to spare
//   kTallestTile     the most rows of a register tile, where a few taller tiles are faster than many low ones
//   kUnroll          terms of a sum in one turn of the inner loop of products
//   kChain           the most terms that are added one after the other: rounding errors grow with them. Sums of shorter
//                    chains are as accurate as PyTorch's blocked products
//   fma(a, b, c)     a * b + c of Vec<float> and Vec<double>, with one rounding wherever the hardware can. No other
//   code
//                    may fuse (-ffp-contract=off): otherwise a compiler could fuse in one register tile and not in
//                    another, and a row's result would depend on its batch
//   add_product(sum, a, b)   fma(a, b, sum) in the inner loop of products, where every register is taken
//   clamp(x, low, high)      of Vec<float>; NaN stays NaN
//   divide(a, b)     a / b of Vec<float> within 0.6 units in the last place, for b in the normal range
//   load_first(p, n)         the first n < kLanes numbers at p; other lanes are zero, and their memory is not read
//   store_first(p, v, n)     writes the first n < kLanes numbers of v to p; memory behind them is not written
//   multiply_low(a, b)       of Words64: products of the low halves of 64-bit words
//   half_to_float(x), float_to_half(x)   one float16, to nearest even
//
// fallback.h has the last seven in code that every CPU can run: `using fallback::divide;` is enough.
//
// A port also needs: a line in the choice below; NAME.cpp with FASTLSTM_KERNELS(NAME), unless one build of the library
// has no other instruction set (as on aarch64, where portable.cpp is compiled with neon.h); its entry in dispatch.cpp,
// in order of speed and with the test whether this CPU has it; its flags in SOURCES of setup.py.
#pragma once

#if defined(__AVX512F__)
#include "cpu/isa/avx512.h"
#elif defined(__x86_64__) && defined(__AVX2__)
#include "cpu/isa/avx2.h"
#elif defined(__aarch64__)
#include "cpu/isa/neon.h"
#else
#include "cpu/isa/generic.h"
#endif

// Whether this machine and its kernel let a process use AMX tiles of bfloat16, with the vector instructions that go with them.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" __attribute__((visibility("default"))) bool mla2dsa_amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const unsigned amx = 1u << 22 | 1u << 24;                           // BF16, TILE
  if ((b & avx512) != avx512 || (d & amx) != amx) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & 1u << 5) == 0) return false;  // AVX512_BF16
  constexpr long request = 0x1023, tile_data = 18;                                   // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

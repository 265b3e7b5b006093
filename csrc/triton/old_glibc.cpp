// As csrc/old_glibc.cpp, of what only this library uses: functions that have moved from libdl into libc.
#include <cstddef>

#ifdef __GLIBC__
#ifdef __x86_64__
#define OLD(name) asm(".symver old_" #name ", " #name "@GLIBC_2.2.5")
#else
#define OLD(name) asm(".symver old_" #name ", " #name "@GLIBC_2.17")
#endif

extern "C" {

OLD(dlopen);
void* old_dlopen(const char* file, int mode);
void* dlopen(const char* file, int mode) noexcept { return old_dlopen(file, mode); }

OLD(dlerror);
char* old_dlerror();
char* dlerror() noexcept { return old_dlerror(); }
}
#endif

// A library that is linked on a newer Linux asks for the newest version of each function of glibc and libstdc++, and
// then loads on no older one. These are all that the kernels, with the headers of libstdc++ and torch, use and that
// glibc 2.28 and its libstdc++ have not: here each becomes an older one. So a wheel made on any Linux runs wherever
// torch does. old_glibc.map keeps them within the library; tests/test_wheel.py looks at the result.
#include <cstdlib>

#if defined(__GLIBC__) && defined(__GLIBCXX__)
#include <pthread.h>
#include <signal.h>

#include <new>
#include <sstream>

#ifdef __x86_64__
#define OLD(name, x86, others) asm(".symver old_" #name ", " #name "@" x86)
#else
#define OLD(name, x86, others) asm(".symver old_" #name ", " #name "@" others)
#endif

extern "C" {

// The newer one differs in errno.
OLD(exp, "GLIBC_2.2.5", "GLIBC_2.17");
double old_exp(double x);
double exp(double x) { return old_exp(x); }

// The newer ones have moved from libpthread into libc.
OLD(pthread_sigmask, "GLIBC_2.2.5", "GLIBC_2.17");
int old_pthread_sigmask(int how, const sigset_t* set, sigset_t* old);
int pthread_sigmask(int how, const sigset_t* set, sigset_t* old) noexcept { return old_pthread_sigmask(how, set, old); }

OLD(pthread_setname_np, "GLIBC_2.12", "GLIBC_2.17");
int old_pthread_setname_np(pthread_t thread, const char* name);
int pthread_setname_np(pthread_t thread, const char* name) noexcept { return old_pthread_setname_np(thread, name); }

// It has moved from libdl; torch's headers use it from torch 2.14 on.
OLD(dlsym, "GLIBC_2.2.5", "GLIBC_2.17");
void* old_dlsym(void* library, const char* name);
void* dlsym(void* library, const char* name) noexcept { return old_dlsym(library, name); }

// std::shared_ptr saves an atomic operation where this says that there is one thread.
char __libc_single_threaded = 0;
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
template class basic_ostringstream<char>;
template class basic_stringstream<char>;
}  // namespace std
#endif

/* Preloaded into a process: lets a chosen system call on a chosen file fail, as a disk does. See failing_calls.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char wanted[4096];
static long nth, passed;
static int code, for_good, armed;

/* Calls on paths that contain `part` are counted; the nth of them fails, and with `good` all writing ones after it. */
void fault_arm(const char *part, long n, int error, int good) {
    pthread_mutex_lock(&lock);
    strncpy(wanted, part, sizeof wanted - 1);
    nth = n, code = error, for_good = good, passed = 0, armed = 1;
    pthread_mutex_unlock(&lock);
}

long fault_disarm(void) {
    pthread_mutex_lock(&lock);
    long found = passed;
    armed = 0;
    pthread_mutex_unlock(&lock);
    return found;
}

static int fails(const char *path) {
    if (!armed || !path || !strstr(path, wanted)) return 0;
    pthread_mutex_lock(&lock);
    passed++;
    int now = armed && (passed == nth || (for_good && nth && passed > nth));
    pthread_mutex_unlock(&lock);
    if (now) errno = code;
    return now;
}

static int fails_on(int handle) {
    if (!armed) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name)

#define OPENS(function) \
    int function(const char *path, int flags, ...) { \
        REAL(int, #function, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if ((flags & O_ACCMODE) != O_RDONLY && fails(path)) return -1; \
        return real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define STREAMS(function) \
    FILE *function(const char *path, const char *mode) { \
        REAL(FILE *, #function, const char *, const char *); \
        if (strpbrk(mode, "wa+") && fails(path)) return NULL; \
        return real(path, mode); \
    }
STREAMS(fopen)
STREAMS(fopen64)

ssize_t write(int handle, const void *bytes, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return fails_on(handle) ? -1 : real(handle, bytes, size);
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return fails_on(handle) ? -1 : real(handle, parts, count);
}
int fsync(int handle) {
    REAL(int, "fsync", int);
    return fails_on(handle) ? -1 : real(handle);
}
int ftruncate64(int handle, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return fails_on(handle) ? -1 : real(handle, size);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return fails(path) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return fails(to) ? -1 : real(from, to);
}

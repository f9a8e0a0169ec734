/* The load client of bench.py: many WebSocket clients in one thread, with epoll.
 *
 *   loadclient PORT PATH COUNT [--send TEXT] [--repeat N] [--answers N] [--parallel N]
 *              [--deflate] [--engineio] [--stream] [--stuck] [--spin]
 *
 * If --stream is given, they receive server-sent events over plain HTTP instead, and send no data.
 *
 * It opens COUNT connections to 127.0.0.1, at most --parallel of them at the same time (default:
 * one after the other). On each it sends TEXT (there may be several) N times, and every '#' in it
 * becomes a running number. A connection is ready when that many answers have arrived. When all
 * are ready it prints {"ready": ...}. Then it reads commands from standard input and answers each
 * with a line of JSON:
 *
 *   expect EVENTS MILLISECONDS   {"armed": 1} at once, and a report when every client has EVENTS
 *                                events or the time is over
 *   pings                        {"pings": N}, the number of pings answered so far
 *   stuck                        reads the connection that was not read until now, and reports
 *                                how the server closed it
 *   exit
 *
 * It must be much faster than any server, so it parses no JSON: it looks for the number of an
 * event at the place where the previous frame had it. Every event of a connection must carry the
 * number after that of the event before. If --spin is given, it does not sleep while it expects
 * events. Otherwise the client would fall asleep whenever a server pauses between its system calls.
 * On a virtual machine, waking it takes as long as the system call itself, and that time would be
 * charged to the server. All times are CLOCK_MONOTONIC, as time.monotonic_ns().
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_ZLIB
#include <zlib.h>
#endif

enum { LIFETIME_S = 600, PATIENCE_S = 30, SCRATCH = 1 << 20, MAX_TEXTS = 16, NO_SEQ = -1 };
enum { TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10 };
/* CONNECTING: TCP is not connected yet. UPGRADING: the handshake was sent. GREETING: the messages
 * of --send were sent, answers are missing. READY: counted as connected. */
enum { CONNECTING, UPGRADING, GREETING, READY };

typedef struct {
    int fd, state, open, stuck, close_code, deflated;
    int64_t started_ns, ready_ns;
    /* The beginning of an incomplete frame or of an incomplete response to the handshake. */
    unsigned char *rest;
    size_t rest_len, rest_size;
    /* Events since the last `expect`; all other messages since the connection was opened. */
    long frames, answers;
    int64_t last_seq, latency_ns;
#ifdef WITH_ZLIB
    z_stream inflater;
#endif
} Client;

static struct {
    int port, parallel, deflate, engineio, stream, stuck, spin, repeat, texts;
    const char *path, *text[MAX_TEXTS];
    long answers;
} options = {.parallel = 1, .repeat = 1};

static Client *clients;
static int count, poller, ready_count;
static long pings;
static unsigned char scratch[SCRATCH], plain[SCRATCH];

/* Counted since the last `expect`. */
static long expected, total, complete, order_errors, bad_frames, unseen;
static size_t smallest, largest;
static int64_t first_ns, last_ns, wire_bytes, cpu_at_first, spun_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int64_t cpu_ns(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * INT64_C(1000000000) +
           (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * INT64_C(1000);
}

static void print_line(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void die(const char *subject) {
    fprintf(stderr, "loadclient: %s: %s\n", subject, errno ? strerror(errno) : "unexpected");
    exit(1);
}

/* A client must mask its frames; a key of four zero bytes is allowed and changes no byte. */
static void send_frame(Client *c, int opcode, const void *payload, size_t length) {
    unsigned char head[8] = {0x80 | opcode, 0x80 | length}, frame[8 + 4096];
    size_t n = 6;
    if (length > 4096) die("message too long to send");
    if (length > 125) {
        head[1] = 0x80 | 126;
        head[2] = length >> 8;
        head[3] = length & 0xff;
        n = 8;
    }
    memcpy(frame, head, n);
    memcpy(frame + n, payload, length);
    ssize_t sent = send(c->fd, frame, n + length, MSG_NOSIGNAL);
    /* If the connection is lost, the next read reports it. Half a frame would damage the stream. */
    if (sent < 0 ? errno == EAGAIN : sent != (ssize_t)(n + length)) die("cannot send a frame");
}

static void set_closed(Client *c) {
    if (!c->open) return;
    c->open = 0;
    epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, NULL);
}

/* The number after `name` in a message, or NO_SEQ. *hint is its place in the last message. */
static int64_t number_after(const char *name, size_t *hint, const unsigned char *text, size_t n) {
    size_t length = strlen(name);
    const unsigned char *at = text + *hint, *end = text + n;
    if (*hint + length > n || memcmp(at, name, length)) {
        at = memmem(text, n, name, length);
        if (!at) return NO_SEQ;
        *hint = at - text;
    }
    at += length;
    while (at < end && *at == ' ') at++;
    int64_t value = 0;
    while (at < end && *at >= '0' && *at <= '9') value = value * 10 + (*at++ - '0');
    return value;
}

static void on_message(Client *c, unsigned char *text, size_t n, int compressed, int64_t now) {
    static size_t seq_hint, sent_hint;
    int64_t seq;
    if (compressed) {
#ifdef WITH_ZLIB
        /* RFC 7692: the sender leaves out the last four bytes of a flushed deflate block. */
        static unsigned char tail[] = {0, 0, 0xff, 0xff};
        z_stream *z = &c->inflater;
        z->next_out = plain, z->avail_out = sizeof plain;
        z->next_in = text, z->avail_in = n;
        if (inflate(z, Z_SYNC_FLUSH) < 0) bad_frames++;
        z->next_in = tail, z->avail_in = sizeof tail;
        if (inflate(z, Z_SYNC_FLUSH) < 0) bad_frames++;
        text = plain, n = sizeof plain - z->avail_out;
#else
        unseen++; /* It cannot be read. Once all answers are in, it counts as an event. */
#endif
    }
    if (options.engineio && n == 1 && *text == '2') {
        pings++;
        send_frame(c, TEXT, "3", 1);
        return;
    }
#ifndef WITH_ZLIB
    if (compressed)
        seq = expected ? c->last_seq + 1 : NO_SEQ;
    else
#endif
        seq = number_after("\"seq\":", &seq_hint, text, n);
    if (seq == NO_SEQ) {
        c->answers++;
        return;
    }
    if (c->last_seq != NO_SEQ && seq != c->last_seq + 1) order_errors++;
    c->last_seq = seq;
    if (c->stuck) return;
    if (!total++) {
        first_ns = now;
        cpu_at_first = cpu_ns(), spun_ns = 0;
    }
    last_ns = now;
    if (n < smallest) smallest = n;
    if (n > largest) largest = n;
    if (++c->frames == expected) complete++;
    if (expected == 1) c->latency_ns = now - number_after("\"sent_ns\":", &sent_hint, text, n);
}

/* Handle the complete messages of an event stream. Return how many bytes they have. */
static size_t feed_stream(Client *c, unsigned char *data, size_t n, int64_t now) {
    unsigned char *at = data, *end = data + n, *stop;
    while ((stop = memmem(at, end - at, "\n\n", 2))) {
        unsigned char *text = memmem(at, stop - at, "data: ", 6);
        if (text) on_message(c, text + 6, stop - text - 6, 0, now);
        at = stop + 2;
    }
    return at - data;
}

/* Handle the complete frames in a buffer and keep the beginning of the next one. */
static void feed(Client *c, unsigned char *data, size_t n, int64_t now) {
    size_t at = options.stream ? feed_stream(c, data, n, now) : 0;
    while (!options.stream && n - at >= 2) {
        unsigned char *head = data + at;
        size_t length = head[1] & 0x7f, skip = 2;
        int opcode = head[0] & 0x0f;
        if (length >= 126) {
            size_t extra = length == 126 ? 2 : 8;
            if (n - at < 2 + extra) break;
            length = 0;
            for (size_t i = 0; i < extra; i++) length = length << 8 | head[2 + i];
            skip += extra;
        }
        if (length > SCRATCH / 2 || head[1] & 0x80 || !(head[0] & 0x80) || head[0] & 0x30) {
            bad_frames++; /* Masked, in fragments, or not a frame: the rest has no meaning. */
            set_closed(c);
            return;
        }
        if (n - at < skip + length) break;
        unsigned char *payload = head + skip;
        if (opcode == TEXT || opcode == BINARY)
            on_message(c, payload, length, head[0] & 0x40, now);
        else if (opcode == PING) {
            pings++;
            send_frame(c, PONG, payload, length);
        } else if (opcode == CLOSE) {
            c->close_code = length >= 2 ? payload[0] << 8 | payload[1] : 1005;
            set_closed(c);
            return;
        } else if (opcode != PONG)
            bad_frames++;
        at += skip + length;
    }
    c->rest_len = n - at;
    if (c->rest_len > c->rest_size) {
        c->rest_size = c->rest_len * 2;
        c->rest = realloc(c->rest, c->rest_size);
    }
    if (c->rest_len) memcpy(c->rest, data + at, c->rest_len);
}

/* One read. Return the result of recv(). */
static ssize_t read_some(Client *c) {
    memcpy(scratch, c->rest, c->rest_len);
    ssize_t n = recv(c->fd, scratch + c->rest_len, SCRATCH - c->rest_len, 0);
    if (n > 0) {
        wire_bytes += n;
        feed(c, scratch, c->rest_len + n, now_ns());
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        set_closed(c);
    return n;
}

/* A server that leaves Nagle's algorithm on would wait 40 ms for our ACK on each connection. */
static void acknowledge_at_once(Client *c) {
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
}

static void start_connecting(Client *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options.port)};
    struct epoll_event watch = {.events = EPOLLOUT, .data.ptr = c};
    int on = 1, small = 4096, segment = 1400;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->open = 1, c->last_seq = NO_SEQ;
    c->rest = malloc(c->rest_size = 4096);
    c->started_ns = now_ns();
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (c->stuck) {
        /* Otherwise loopback, with segments of 64 KiB, buffers megabytes for this client. */
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        setsockopt(c->fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    }
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        die("connect");
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &watch);
}

static void send_handshake(Client *c) {
    struct epoll_event watch = {.events = EPOLLIN, .data.ptr = c};
    char request[1024];
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) errno = error, die("connect");
    int n = snprintf(request, sizeof request,
                     options.stream ? "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%.0s\r\n" :
                     "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                     "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Key: c3dpZnRjbXMtYmVuY2ghIQ==\r\n%s\r\n",
                     options.path, options.port,
                     options.deflate ? "Sec-WebSocket-Extensions: permessage-deflate; "
                                       "client_max_window_bits\r\n" : "");
    acknowledge_at_once(c);
    if (send(c->fd, request, n, MSG_NOSIGNAL) != n) die("handshake");
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &watch);
    c->state = UPGRADING;
}

static void send_filled(Client *c, const char *text, long number) {
    char filled[4096];
    size_t n = 0;
    for (const char *p = text; *p && n < sizeof filled - 24; p++) {
        if (*p == '#')
            n += sprintf(filled + n, "%ld", number);
        else
            filled[n++] = *p;
    }
    send_frame(c, TEXT, filled, n);
}

static void send_greeting(Client *c) {
    static long running;
    for (int i = 0; i < options.repeat; i++, running++)
        for (int k = 0; k < options.texts; k++) send_filled(c, options.text[k], running);
    c->state = GREETING;
}

/* Read the response to the handshake. Frames may follow it in the same read. */
static void read_response(Client *c) {
    ssize_t got = recv(c->fd, c->rest + c->rest_len, c->rest_size - c->rest_len - 1, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) die("handshake");
    c->rest[c->rest_len += got] = 0;
    char *head = (char *)c->rest, *end = strstr(head, "\r\n\r\n");
    if (!end) return;
    *end = 0;
    if (!strstr(head, options.stream ? " 200 " : " 101 ")) {
        fprintf(stderr, "loadclient: refused: %s\n", head);
        exit(1);
    }
    c->deflated = strcasestr(head, "permessage-deflate") != NULL;
#ifdef WITH_ZLIB
    if (c->deflated && inflateInit2(&c->inflater, -15) != Z_OK) die("zlib");
#endif
    size_t used = end + 4 - head, rest = c->rest_len - used;
    send_greeting(c);
    memcpy(scratch, c->rest + used, rest);
    feed(c, scratch, rest, now_ns());
}

static void on_ready(Client *c) {
    if (c->state == READY) {
        read_some(c);
        return;
    }
    if (c->state == CONNECTING)
        send_handshake(c);
    else if (c->state == UPGRADING)
        read_response(c);
    else
        read_some(c);
    if (!c->open) {
        fprintf(stderr, "loadclient: closed with %d instead of an answer\n", c->close_code);
        exit(1);
    }
    if (c->state != GREETING || c->answers < options.answers) {
        acknowledge_at_once(c);
        return;
    }
    c->state = READY;
    c->ready_ns = now_ns();
    ready_count++;
    if (c->stuck) epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, NULL);
}

static void connect_all(void) {
    struct epoll_event ready[256];
    int64_t progress_ns = now_ns();
    int started = 0;
    while (ready_count < count) {
        int before = ready_count;
        while (started < count && started - ready_count < options.parallel)
            start_connecting(clients + started++);
        /* Connecting may take long: the clients that are ready must answer the server's pings. */
        int n = epoll_wait(poller, ready, 256, 1000);
        for (int i = 0; i < n; i++) on_ready(ready[i].data.ptr);
        if (ready_count > before) progress_ns = now_ns();
        if (now_ns() - progress_ns > PATIENCE_S * INT64_C(1000000000)) {
            fprintf(stderr, "loadclient: %d of %d clients are ready\n", ready_count, count);
            errno = ETIMEDOUT, die("waiting for an answer");
        }
    }
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Sort the values and write their median, 99th percentile and maximum. */
static void quantiles(int64_t *values, long n, int64_t *p50, int64_t *p99, int64_t *max) {
    qsort(values, n, sizeof *values, by_size);
    *p50 = n ? values[n / 2] : 0;
    *p99 = n ? values[n * 99 / 100] : 0;
    *max = n ? values[n - 1] : 0;
}

static void report_ready(void) {
    int64_t *spent = malloc(sizeof *spent * count), p50, p99, max, last = 0;
    int deflated = 0, inflates = 0;
#ifdef WITH_ZLIB
    inflates = 1;
#endif
    for (int i = 0; i < count; i++) {
        spent[i] = clients[i].ready_ns - clients[i].started_ns;
        if (clients[i].ready_ns > last) last = clients[i].ready_ns;
        deflated += clients[i].deflated;
    }
    quantiles(spent, count, &p50, &p99, &max);
    print_line("{\"ready\": %d, \"deflated\": %d, \"inflates\": %s, \"ready_ns\": %lld, "
               "\"p50_ns\": %lld, \"p99_ns\": %lld, \"max_ns\": %lld}",
               count, deflated, inflates ? "true" : "false",
               (long long)(last - clients->started_ns), (long long)p50, (long long)p99,
               (long long)max);
    free(spent);
}

static void report(void) {
    long fewest = -1, most = 0, closed = 0, measured = 0;
    int close_code = 0;
    int64_t *latency = malloc(sizeof *latency * count), p50, p99, max;
    /* If --spin is given, the time without waiting; otherwise the processor's time. */
    int64_t busy = 0;
    if (total && spun_ns)
        busy = now_ns() - first_ns - spun_ns;
    else if (total)
        busy = cpu_ns() - cpu_at_first;
    for (Client *c = clients; c < clients + count; c++) {
        if (c->stuck) continue;
        if (fewest < 0 || c->frames < fewest) fewest = c->frames;
        if (c->frames > most) most = c->frames;
        closed += !c->open;
        if (c->close_code) close_code = c->close_code;
        if (expected == 1 && c->frames) latency[measured++] = c->latency_ns;
    }
    quantiles(latency, measured, &p50, &p99, &max);
    print_line("{\"frames\": %ld, \"fewest\": %ld, \"most\": %ld, \"complete\": %ld, "
               "\"closed\": %ld, \"close_code\": %d, \"order_errors\": %ld, \"bad_frames\": %ld, "
               "\"unseen\": %ld, \"first_ns\": %lld, \"last_ns\": %lld, \"wire_bytes\": %lld, "
               "\"smallest\": %zu, \"largest\": %zu, \"busy_ns\": %lld, \"p50_ns\": %lld, "
               "\"p99_ns\": %lld, \"max_ns\": %lld}",
               total, fewest, most, complete, closed, close_code, order_errors, bad_frames, unseen,
               (long long)first_ns, (long long)last_ns, (long long)wire_bytes,
               total ? smallest : 0, largest, (long long)busy, (long long)p50, (long long)p99,
               (long long)max);
    free(latency);
    /* Errors that are seen while no event is expected belong to the next report. */
    expected = order_errors = bad_frames = unseen = 0;
}

/* Read the data that waits for the stuck connection, and report how the server closed it. */
static void report_stuck(void) {
    Client *c = clients;
    struct timeval patience = {.tv_sec = 1};
    const char *outcome = "open";
    ssize_t n = 1;
    fcntl(c->fd, F_SETFL, 0);
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    wire_bytes = 0;
    while (c->open && (n = read_some(c)) > 0) continue;
    if (c->close_code)
        outcome = "closed";
    else if (!c->open)
        outcome = n < 0 ? "reset" : "cut";
    print_line("{\"end\": \"%s\", \"code\": %d, \"bytes\": %lld, \"order_errors\": %ld}", outcome,
               c->close_code, (long long)wire_bytes, order_errors);
}

static void expect(long events) {
    for (Client *c = clients; c < clients + count; c++) c->frames = 0;
    expected = events, total = complete = 0;
    wire_bytes = 0, smallest = SIZE_MAX, largest = 0, first_ns = last_ns = 0;
    print_line("{\"armed\": 1}");
}

static void parse_options(int argc, char **argv) {
    options.port = atoi(argv[1]), options.path = argv[2], count = atoi(argv[3]);
    for (int i = 4; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--deflate")) options.deflate = 1;
        else if (!strcmp(name, "--engineio")) options.engineio = 1;
        else if (!strcmp(name, "--stream")) options.stream = 1;
        else if (!strcmp(name, "--stuck")) options.stuck = 1;
        else if (!strcmp(name, "--spin")) options.spin = 1;
        else if (i + 1 == argc) fputs("loadclient: a value is missing\n", stderr), exit(2);
        else if (!strcmp(name, "--send") && options.texts < MAX_TEXTS)
            options.text[options.texts++] = argv[++i];
        else if (!strcmp(name, "--repeat")) options.repeat = atoi(argv[++i]);
        else if (!strcmp(name, "--answers")) options.answers = atol(argv[++i]);
        else if (!strcmp(name, "--parallel")) options.parallel = atoi(argv[++i]);
        else fprintf(stderr, "loadclient: unknown %s\n", name), exit(2);
    }
}

int main(int argc, char **argv) {
    struct epoll_event ready[256], watch = {.events = EPOLLIN}; /* No client: standard input. */
    int64_t deadline = 0;
    if (argc < 4) return fputs("usage: loadclient PORT PATH COUNT [options]\n", stderr), 2;
    parse_options(argc, argv);
    alarm(LIFETIME_S); /* It must not outlive a bench.py that was killed. */
    clients = calloc(count, sizeof *clients);
    clients->stuck = options.stuck;
    poller = epoll_create1(0);
    connect_all();
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &watch);
    report_ready();
    for (;;) {
        int64_t now = now_ns(), left = expected ? (deadline - now) / 1000000 : 1000;
        int n = epoll_wait(poller, ready, 256, left < 0 || (options.spin && expected) ? 0 : left);
        if (options.spin && expected && !n) spun_ns += now_ns() - now;
        for (int i = 0; i < n; i++) {
            char line[256];
            if (ready[i].data.ptr) {
                on_ready(ready[i].data.ptr);
                continue;
            }
            ssize_t got = read(0, line, sizeof line - 1); /* bench.py sends one at a time. */
            if (got <= 0) return 0;
            line[got] = 0;
            long events, patience;
            if (sscanf(line, "expect %ld %ld", &events, &patience) == 2) {
                deadline = now_ns() + patience * INT64_C(1000000);
                expect(events);
            } else if (!strncmp(line, "stuck", 5))
                report_stuck();
            else if (!strncmp(line, "pings", 5))
                print_line("{\"pings\": %ld}", pings);
            else
                return 0;
        }
        if (expected && (complete == count - options.stuck || now_ns() >= deadline)) report();
    }
}
